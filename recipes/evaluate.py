from hpt_hf.evaluate import main

if __name__ == "__main__":
    main()
