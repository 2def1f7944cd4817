"""Files of predictions that other tools read: formats of images, videos, and rasters of any size."""
