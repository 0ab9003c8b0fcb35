"""Run a stand-alone selector."""

import onnxruntime as ort


def run(model, visual, text, text_mask, token_mask, outputs=None, **more):
    """The outputs, by name, of a selector in ONNX Runtime; `more` are its further inputs."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"image_features": visual, "text_embeds": text, "text_mask": text_mask, "token_mask": token_mask}
    feed |= more
    return dict(zip([o.name for o in session.get_outputs()], session.run(outputs, feed), strict=True))
