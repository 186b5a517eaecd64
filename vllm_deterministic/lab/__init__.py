"""The lab: why a batch changes bytes, and what each cure costs, measured on the machine at hand."""
