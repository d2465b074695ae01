"""Records and tokens as tables, plots, pictures and one page."""
