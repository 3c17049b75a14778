"""Graphs of models for ONNX Runtime, OpenVINO and ExecuTorch, compiled code, and what runs them."""
