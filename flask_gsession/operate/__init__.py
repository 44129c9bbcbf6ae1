"""What keeps a running application in order: the checks of the doctor and the clean-up."""
