# What a device needs to answer from a bundle: no PyTorch, no exporter. See docs/devices.md.
FROM python:3.11-slim
WORKDIR /opt/resprune
COPY . .
# --build-arg EXTRA=[serve] adds the HTTP server.
ARG EXTRA=
# Compiled here, for `nobody` cannot write what Python compiles; not the tests and tools of packages, 19 MB.
RUN pip install --no-cache-dir --no-compile --constraint constraints.txt ".$EXTRA" && python -m compileall -q -x '/(tests|transformers|quantization|f2py|distutils|huggingface_hub|sympy|mpmath)/' "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
USER nobody
WORKDIR /
ENTRYPOINT ["resprune"]
