// An exception as a C string.
#pragma once
#include <exception>
#include <string>

static std::string message;

template <class Body>
const char* message_of(Body body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
