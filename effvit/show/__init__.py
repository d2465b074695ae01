"""Records and tokens as tables, plots, images and one page."""
