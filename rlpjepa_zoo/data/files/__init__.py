"""Files of images: which files of a folder are taken, and the members of tar archives."""
