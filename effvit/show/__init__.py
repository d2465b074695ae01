"""Records and tokens as tables, plots, figures and one page."""
