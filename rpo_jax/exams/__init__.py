"""Exams: the IgakuQA file format, prompts, and an embedded fictional exam world."""
