"""Data: pictures, scenes made here, data sets made elsewhere. Needs NumPy; Pillow to decode and render."""
