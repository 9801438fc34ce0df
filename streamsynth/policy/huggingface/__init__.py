"""Models in the folder format of Hugging Face: `config.json` and safetensors, in and out.

* `fields`: its JSON files.   `architectures`: config.json -> TransformerConfig.   `description`: and back.
* `names`: which tensors of a file make a parameter.
* `tensors`: safetensors files, memory-mapped in and streamed out.
* `reading`, `writing`: whole models.   `adapters`: LoRA adapters as PEFT keeps them.
"""
