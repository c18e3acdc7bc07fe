"""A trained model in use: `export` writes it, `runtime` runs it without PyTorch, `timing` times it.

from jettclip.deploy.export import export, quantize
from jettclip.deploy.runtime import load

export(model, "exported")                  # both towers as ONNX graphs, checked against PyTorch
quantize("exported", "exported-int8")      # 8 bits in matrix products
model = load("exported", "openvino-bf16")
image, text = model.encode_image(["photo.jpg"]), model.encode_text(["a long description ..."])
print(text @ image.T)
"""
