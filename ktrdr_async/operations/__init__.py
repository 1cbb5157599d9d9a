"""Operations: their life cycle and the service that keeps it in the database."""
