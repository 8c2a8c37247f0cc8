"""Checkpoints: conversion from and to HuggingFace, training state, fingerprints."""
