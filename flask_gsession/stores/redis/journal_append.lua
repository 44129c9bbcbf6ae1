-- Nothing but the entries.
return 'K'
