"""Model families: one module each, images to arrays and spans; `table.py` has one row for each family."""
