"""Graphs of models for ONNX Runtime and OpenVINO, and what runs them."""
