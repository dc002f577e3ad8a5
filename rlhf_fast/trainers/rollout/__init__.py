"""Samplers behind one protocol: own loop, transformers' generate and continuous batching, a server, conversations."""
