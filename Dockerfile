# For machines with an NVIDIA GPU and its container toolkit:
#   docker build -t hpt_hf . && docker run --gpus all -v "$PWD:/work" hpt_hf train --config quickstart --output_dir m
FROM python:3.12-slim
RUN useradd --create-home user
COPY . /opt/hpt_hf
# torch's default wheels for Linux carry CUDA.
RUN pip install --no-cache-dir "/opt/hpt_hf[lora,track]"
USER user
WORKDIR /work
ENTRYPOINT ["hpt-hf"]
CMD ["--help"]
