"""The models of a run: loading and saving, adapters, quantisation, references, critics, reward models."""
