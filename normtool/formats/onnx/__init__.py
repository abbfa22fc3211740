"""ONNX files and `onnx.ModelProto` objects."""
