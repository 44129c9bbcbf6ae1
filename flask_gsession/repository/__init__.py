"""An application's sessions in their store: how to find, create, save, rotate and end them."""
