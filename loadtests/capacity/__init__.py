"""How much load a model on a slice bears within its SLO."""
