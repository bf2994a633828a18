"""What `ouro-serve calibrate` refuses."""


class CalibrationError(ValueError):
    """Input or state that cannot be used; the message names it and says what is allowed."""
