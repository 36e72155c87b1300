"""What makes tables, pictures, figures of speed and the toy: a file for each command of train.py, and what they share."""
