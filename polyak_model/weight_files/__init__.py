"""What lies in the files of models, read with distrust and written whole; knows no model."""
