"""The names and shapes of published DiffMask and Hard Concrete code, on the operations of this package."""
