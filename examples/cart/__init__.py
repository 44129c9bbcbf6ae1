"""A cart for scarce goods and many buyers, on Redis or MongoDB."""
