from hpt_hf.dial import main

if __name__ == "__main__":
    main()
