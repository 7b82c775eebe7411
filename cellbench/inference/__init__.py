"""A trained run in use: segmenting images, writing masks and tables, exporting."""
