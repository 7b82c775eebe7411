"""Trainable decoders from a backbone's maps to class scores at every pixel; ``base`` says what each promises."""
