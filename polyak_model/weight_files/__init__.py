"""Reads and writes weight files of Keras, without Keras and as untrusted input."""
