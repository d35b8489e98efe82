"""Cleaning: repair, filters, masking, decontamination and removal of duplicates, as datatrove pipelines."""
