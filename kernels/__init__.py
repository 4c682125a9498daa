"""The operations a model spends its time in: one folder per family, each with a plain reference beside what is fast."""
