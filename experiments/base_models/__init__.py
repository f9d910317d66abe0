"""The parts of ../build_base_models.py: data, networks, training, and the cards of the base models under assets/."""
