"""The files of a PolyakModel."""
