"""From a row in a file to padded tensors: formats, media, encoding, collation."""
