"""Several LoRAs as one, a LoRA of a smaller rank, and the LoRA between two models; all through lora_file.

methods.py · how several changes of one weight become one; merge.py · LoRA files as one; zip_lora.py · ZipLoRA, which
learns how much of each column to take; resize.py · smaller ranks; extract.py · the difference of two models as a LoRA;
base_model.py · a base model with changes in its weights.
"""
