"""What every room stands on: numbers and sizes as people write them, files written whole or not at all, JSON of strangers."""
