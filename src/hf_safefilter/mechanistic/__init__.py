"""What makes and breaks safety tuning: synthetic data, safety-tuning methods and analyses of Jain et al. 2024 (2407.10264).

`synthetic` makes the data, `tuning` the models, `analyses` looks at what tuning changed, in these and in any
Hugging Face chat model; `study` runs the whole of it on synthetic data, `compare` the analyses on real models.
"""
