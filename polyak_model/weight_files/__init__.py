"""Reads untrusted weight files of Keras and writes new ones, without Keras."""
