"""The ops on the matrix of similarities of images and texts, which is never stored: loss, negatives, ranks."""
