"""What makes a PolyakModel a Keras model: how it is built, compiled, trained and described."""
