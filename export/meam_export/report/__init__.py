"""A report on training runs and policy folders: one self-contained HTML page."""
