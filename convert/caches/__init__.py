"""Latents that other projects have stored: one module for each kind of layout."""
