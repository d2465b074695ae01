"""Making data sets out of pictures that ordinary package clients install: fetching, opening, pasting, writing."""
