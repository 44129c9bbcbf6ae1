"""Operations: the doctor's checks and the clean-up."""
