"""The model cards: their facts, figures and pages. tools/make_model_cards.py writes them."""
