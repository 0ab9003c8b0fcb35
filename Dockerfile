# What a device needs to answer from a bundle: no PyTorch, no exporter. See docs/devices.md.
FROM python:3.11-slim
WORKDIR /opt/resprune
COPY . .
# --build-arg EXTRA=[serve] adds the HTTP server.
ARG EXTRA=
RUN pip install --no-cache-dir --constraint constraints.txt ".$EXTRA"
USER nobody
WORKDIR /
ENTRYPOINT ["resprune"]
