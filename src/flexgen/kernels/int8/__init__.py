"""Matrix products of numbers that were rounded to 8 bits: rounding, the products, and the scales afterwards."""
