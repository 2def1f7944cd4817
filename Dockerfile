# An image with all commands of this project; a GPU is used if the engine hands one over (docker run --gpus all).
#   docker build -t unept .
#   docker run --rm -v "$PWD:/data" unept unept.train                       (leaves /data/runs/shapes)
#   docker run --rm -v "$PWD:/data" unept unept.predict street.jpg
FROM python:3.12-slim

# Triton compiles a launcher in C for every kernel.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /source/
COPY kernels /source/kernels
COPY unept /source/unept
RUN pip install --no-cache-dir "/source[outputs]"

WORKDIR /data
ENTRYPOINT ["python", "-m"]
CMD ["unept.train"]
