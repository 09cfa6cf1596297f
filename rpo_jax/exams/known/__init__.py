"""The exams that can be asked, a file each: adding one in the same format is adding a file."""
